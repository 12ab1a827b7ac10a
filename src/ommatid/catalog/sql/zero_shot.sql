-- zero_shot(sae, spliced): zero-shot classification of evaluation images by the model with x̂, or another stand-in, in place of x at the hookpoint.
-- No rows of an SAE where it could not be measured: summary.zero_shot in the manifest of its evaluation says why.
CREATE TABLE zero_shot AS
SELECT *
FROM read_parquet($zero_shot)
ORDER BY sae, cross_entropy, spliced;
