"""What other training stacks are told, one module for each: `lightning`, `transformers`. None is imported by itself."""
