"""Export: quantized model -> exact INT8 program -> verified artifact folder."""
