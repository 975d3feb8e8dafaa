"""Pure maths of learning: advantages, losses, schedules, and how trees become batches and batches micro-batches."""
