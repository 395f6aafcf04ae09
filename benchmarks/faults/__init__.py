"""Faults injected into real runs: does each still end with the undisturbed run's bits, or say what is wrong?"""
