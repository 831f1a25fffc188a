"""What quantization does to a model, layer by layer: statistics, sensitivity, robustness, mixed precision, the report."""
