"""Distillation: train a program to compute what others compute, at their outputs and inside of them."""
