"""Both products of every operator in PyTorch's own database, against PyTorch's derivatives."""
