"""The paper in pure tensors: noise path, inversion, objectives. No model, no data."""
