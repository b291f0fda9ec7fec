"""Room 2: data sets, augmentation, the mapper from a record to a model input, and the loaders."""
