"""Data: folders of pairs, the named sets of the papers, and embedded scenes."""
