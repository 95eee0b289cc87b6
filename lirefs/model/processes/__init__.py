"""Several processes of `torch.distributed` that do one thing together."""
