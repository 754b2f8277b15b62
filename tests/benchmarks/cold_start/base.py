"""The base model without any training, as a row of the study: the probability of its answer.

python tests/benchmarks/cold_start/base.py --data FOLDER --base-model FOLDER
"""

from study import BASE_ROW, CONFIG, REPOSITORY, measure_untrained, scores_with, study_of, study_parser

from csrm.config import load_config
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model, load_tokenizer
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from csrm.training.settings import TrainConfig


def main() -> None:
    study = study_of(study_parser(__doc__).parse_args())
    base_model = BaseModel(folder=str(study.converted_base_model()))
    config = load_config(REPOSITORY / CONFIG, TrainConfig)
    tokenizer = PromptTokenizer.from_json(load_tokenizer(base_model).to_str(), config.budgets)
    model = PackedRelevanceModel(load_language_model(base_model), tokenizer.label_ids(config.labels)).eval()
    scorer = PairScorer(
        tokenizer,
        config.labels,
        pack_scorer=torch_pack_scorer(model, config.tuning.precision),
        tokens_per_call=config.pack_tokens,
    )
    measure_untrained(study, BASE_ROW, scores_with(scorer))


if __name__ == "__main__":
    main()
