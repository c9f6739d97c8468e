"""Text for calibration and evaluation, as windows of tokens."""
