"""Pre-training by flow matching, of the embedded models of images and of robots: `rlflow pretrain`."""
