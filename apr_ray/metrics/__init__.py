"""Metrics of trees and of training: names and units in one table, and the numbers behind them."""
