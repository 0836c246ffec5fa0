"""Many processes, by torch.distributed: what they tell each other, and what each of them holds."""
