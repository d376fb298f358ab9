"""The commands of `moepp`: one file each, with its flags and few lines."""
