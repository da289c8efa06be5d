"""What is asked of values that users give."""

import math
import numbers


def is_number(value):
    """Whether `value` is a real number that is finite, and neither text nor a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
