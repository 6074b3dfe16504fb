"""Copy kernels that move pages between engine memory and the arena. Imports nothing of ours."""
