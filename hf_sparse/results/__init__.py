"""Results on disk, with what is needed to repeat a measurement and to resume a run, and as tables for people."""

from hf_sparse.results.files import check_writable, inside, leads_out, write_whole
from hf_sparse.results.folders import (
    CALIBRATE,
    CALIBRATION,
    ROWS,
    SUMMARY,
    TABLES,
    Summary,
    check_folder,
    command_of,
    default_folder,
    plot_name,
    read_json,
    write_json,
    write_summary,
    write_tables,
)
from hf_sparse.results.machine import device_name, find_device, is_main_process, my_share, process_state
from hf_sparse.results.provenance import commit, identity, provenance, record_key, software, versions
from hf_sparse.results.records import Record, ResultFile, resume
from hf_sparse.results.tables import Column, Table, known, make_table, markdown_table, text_table
from hf_sparse.schema import DENSE

__all__ = [
    "CALIBRATE",
    "CALIBRATION",
    "DENSE",
    "ROWS",
    "SUMMARY",
    "TABLES",
    "Column",
    "Record",
    "ResultFile",
    "Summary",
    "Table",
    "check_folder",
    "check_writable",
    "command_of",
    "commit",
    "default_folder",
    "device_name",
    "find_device",
    "identity",
    "inside",
    "is_main_process",
    "known",
    "leads_out",
    "make_table",
    "markdown_table",
    "my_share",
    "plot_name",
    "process_state",
    "provenance",
    "read_json",
    "record_key",
    "resume",
    "software",
    "text_table",
    "versions",
    "write_json",
    "write_summary",
    "write_tables",
    "write_whole",
]
