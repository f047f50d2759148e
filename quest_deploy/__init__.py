"""quest-deploy: QuEST-finetuned diffusion models, from PyTorch to production engines."""

__version__ = "0.1.0"
