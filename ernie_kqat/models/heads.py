"""ERNIE with a head on every token. What they compute is PaddleNLP's; they lack the pooler, which such a model never reads.

With it a quantized model would have a Linear without input, and the exported program one without place.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddlenlp.transformers import (
    ErnieForQuestionAnswering,
    ErnieForSequenceClassification,
    ErnieForTokenClassification,
)


class TokenHead(ErnieForTokenClassification):
    """Logits of each token, [rows, tokens, outputs]."""

    def __init__(self, config):
        super().__init__(config)
        del self.ernie.pooler

    def forward(self, input_ids, token_type_ids=None):
        return self.head(_hidden_states(self.ernie, input_ids, token_type_ids))

    def head(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Of hidden states [rows, tokens, width]."""
        return self.classifier(self.dropout(hidden))


class SpanHead(ErnieForQuestionAnswering):
    """Logits of each token to be an answer's first and its last, [rows, tokens, 2]; PaddleNLP gives two tensors for them."""

    def __init__(self, config):
        super().__init__(config)
        del self.ernie.pooler

    def forward(self, input_ids, token_type_ids=None):
        return self.head(_hidden_states(self.ernie, input_ids, token_type_ids))

    def head(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Of hidden states [rows, tokens, width]; PaddleNLP has no dropout here."""
        return self.classifier(hidden)


CLASSES = {
    "ErnieForSequenceClassification": ErnieForSequenceClassification,
    "ErnieForTokenClassification": TokenHead,
    "ErnieForQuestionAnswering": SpanHead,
}


def head_of(model: paddle.nn.Layer) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """From the encoder's hidden states to the logits."""
    if isinstance(model, (TokenHead, SpanHead)):
        return model.head
    return lambda hidden: model.classifier(model.dropout(model.ernie.pooler(hidden)))


def reads_first_token(model: paddle.nn.Layer) -> bool:
    """Whether the first token's hidden state is all that the head reads."""
    return not isinstance(model, (TokenHead, SpanHead))


def _hidden_states(ernie: paddle.nn.Layer, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None):
    """As ErnieModel.forward, whose mask is of the pooler's type."""
    embedded = ernie.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    mask = paddle.unsqueeze((input_ids == ernie.pad_token_id).astype(embedded.dtype) * -1e4, axis=[1, 2])
    mask.stop_gradient = True
    ernie.encoder._use_cache = False  # PaddleNLP's own encoder asks for it
    return ernie.encoder(embedded, src_mask=mask)
