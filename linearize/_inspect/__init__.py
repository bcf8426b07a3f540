"""Looking inside.

Programs and graphs come in; tables, costs, drawings and pages go out, made of numbers and names
only. Open `summary` first.
"""
