"""Where a step's images come from: order, augmentation, data sets, loading."""
