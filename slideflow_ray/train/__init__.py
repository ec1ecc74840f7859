"""Training: augmentation and the loop. Import the module you need; this package loads nothing."""
