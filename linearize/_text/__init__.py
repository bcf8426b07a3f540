"""Words for people.

Numbers, lines of code and labels come in; tables, short names and progress bars go out. Open
`tables` first.
"""
