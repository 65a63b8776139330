"""What a record that cannot be used raises."""


class Rejected(ValueError):
    """A record that cannot be used: the rule that it breaks, as statistics count it, and the reason in words."""

    def __init__(self, rule: str, reason: str):
        super().__init__(reason)
        self.rule = rule
