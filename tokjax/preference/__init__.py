"""Alignment by comparisons: pairs of answers, or answers that are good or bad."""
