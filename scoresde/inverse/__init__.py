"""Linear inverse problems: operators, and methods that sample what could have been measured."""
