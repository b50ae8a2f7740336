"""Analyses of trained models: what averages over tokens do not show."""
