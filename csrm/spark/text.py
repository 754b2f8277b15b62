"""Text in Spark: what is blank, what is the same, and the terms to search for."""

import pandas as pd
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import ArrayType, StringType

from csrm.text import NOTHING_CLASS, search_terms, text_key


@pandas_udf(ArrayType(StringType()))  # type: ignore[call-overload]  # the stubs want what is inferred
def search_terms_udf(texts: pd.Series) -> pd.Series:
    """`search_terms` of a string column: Spark SQL can neither normalise (NFKC) nor case-fold Unicode text."""
    return texts.map(search_terms)


@pandas_udf(StringType())  # type: ignore[call-overload]  # as above
def text_key_udf(texts: pd.Series) -> pd.Series:
    """`text_key` of a string column; null where the text is null."""
    return texts.map(text_key, na_action="ignore")


def is_blank(text: Column) -> Column:
    """True where a text is null or has nothing but white space and invisible characters, those of any script."""
    return F.coalesce(~text.rlike(f"[^{NOTHING_CLASS}]"), F.lit(True))
