"""The commands of `rlflow`, a file each; a file loads what its command needs when it runs."""
