"""Feed-forward layers: dense MLPs and mixtures of experts."""
