"""The commands of `python -m moepp_jax.main`: one file each, with its flags and few lines."""
