"""Find moments: embeddings of whole videos in a vector store, search, localisation, curation."""

from cmacc.search.calibration import Calibration
from cmacc.search.heat_pictures import write_strip, write_video
from cmacc.search.index import Answer, Index, Moment
from cmacc.search.localise import Localisation, LocalisedMoment, localise
from cmacc.search.query import Query, query_of_file, query_of_text
from cmacc.search.segments import Segment, segments
from cmacc.search.table import Approximate, Description, Rows, SearchError, WindowTable
from cmacc.search.update import EmbedResult, embed_files, export_parquet

__all__ = [
    "Answer",
    "Approximate",
    "Calibration",
    "Description",
    "EmbedResult",
    "Index",
    "Localisation",
    "LocalisedMoment",
    "Moment",
    "Query",
    "Rows",
    "SearchError",
    "Segment",
    "WindowTable",
    "embed_files",
    "export_parquet",
    "localise",
    "query_of_file",
    "query_of_text",
    "segments",
    "write_strip",
    "write_video",
]
