"""Lengths of the sequences of a data set."""

import random


def uniform(number, seed=0):
    return random.Random(seed).choices(range(50, 513), k=number)
