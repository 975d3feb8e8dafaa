"""The currency and the interfaces every other room speaks. Imports only the standard library and numpy."""
