"""What every way of making a model cheaper does with a budget."""

from vitlab.utils.checks import is_number


class BudgetImpossible(ValueError):
    """The cheapest model that a method allows still costs more than the budget; `least`: what it costs, if known."""

    def __init__(self, message, least=None):
        super().__init__(message)
        self.least = least


def demand(name, budget):
    """ValueError for a budget that is no number."""
    if not is_number(budget):
        raise ValueError(f"{name}={budget!r}: a finite number is needed")


def bisect(cost, budget, low, high, steps):
    """The smallest amount in (low, high] whose cost is within the budget, to (high - low) / 2**steps.

    cost(amount) falls, or stays, as the amount grows; cost(high) is taken to be within the budget, unasked.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return high
