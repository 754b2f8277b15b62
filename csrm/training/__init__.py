"""Training: needs torch, transformers and peft (`pip install csrm[train]`)."""
