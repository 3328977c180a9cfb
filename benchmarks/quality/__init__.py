"""Quality: one small encoder with softmax, elu linear and SeT attention, trained on tasks anyone can regenerate."""
