"""Where training images come from, and how they become batches."""
