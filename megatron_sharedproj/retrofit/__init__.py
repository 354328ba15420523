"""A trained qkv model as a K=V model: surgery on its attention, then distillation under the usual trainer."""
