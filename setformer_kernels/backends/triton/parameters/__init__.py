"""References and hyperparameters: brought into the form kernels read, and their gradients."""
