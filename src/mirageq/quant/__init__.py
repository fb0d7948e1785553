"""Quantized networks: what is quantized, to how many bits, and the student that simulates it."""

from mirageq.quant.convert import convert, float_twin
from mirageq.quant.scheme import Scheme, parse_bits
from mirageq.quant.student import Size, Student

__all__ = ["Scheme", "Size", "Student", "convert", "float_twin", "parse_bits"]
