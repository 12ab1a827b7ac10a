-- zero_shot(sae, spliced): zero-shot classification of evaluation images by the model, with x replaced at the hookpoint by x̂ or a baseline.
-- If it could not be measured, the SAE has no rows, and summary.zero_shot in the manifest of its evaluation gives the reason.
CREATE TABLE zero_shot AS
SELECT *
FROM read_parquet($zero_shot)
ORDER BY sae, cross_entropy, spliced;
