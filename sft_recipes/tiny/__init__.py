"""The embedded default: a little world of facts, a base model that has read about it, and questions to fine-tune on."""
