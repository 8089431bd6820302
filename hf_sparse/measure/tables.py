"""The table writer under its former name."""

from hf_sparse.tables import Table as Table
from hf_sparse.tables import markdown_table as markdown_table
from hf_sparse.tables import text_table as text_table
