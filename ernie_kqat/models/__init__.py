"""Models: PaddleNLP names and folders, and BERT-family checkpoints converted to ERNIE's architecture."""
