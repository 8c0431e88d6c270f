"""Complete experiments: data, training, quantization, evaluation, results."""
