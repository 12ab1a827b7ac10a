-- runs(sae): where an SAE comes from, its headline numbers, and what was decided about it; a published catalogue also has a row for each SAE
-- that was decided on before.
CREATE TABLE runs AS
SELECT
    run.sae,
    run.name,
    run.created_at,
    run.model,
    run.hookpoint,
    run.target,
    run.variant,
    run.k,
    run.git_commit,
    run.git_dirty,
    run.dvc_experiment,
    run.dvc_lock,
    run.mlflow_run_id,
    run.prefect_flow_run_id,
    run.images_digest,
    run.activations_digest,
    run.sae_digest,
    run.params::JSON AS params,
    headline.fvu,
    headline.l0,
    headline.dead,
    headline.ms,
    headline.ms_floor,
    headline.judge,
    coalesce(counted.n_latents, 0)::INTEGER AS n_latents,
    coalesce(counted.n_labelled, 0)::INTEGER AS n_labelled,
    counted.label_score,
    counted.control_score,
    counted.beats_control,
    NULL::VARCHAR AS decision,
    NULL::TIMESTAMP AS decided_at,
    NULL::VARCHAR AS reason
FROM read_parquet($runs) AS run
LEFT JOIN comparisons AS headline ON headline.sae = run.sae AND headline.dictionary = 'sae'
LEFT JOIN (
    SELECT
        sae,
        count(*) AS n_latents,
        count(label) AS n_labelled,
        avg(label_score) AS label_score,
        avg(control_score) AS control_score,
        avg((label_score > control_score)::INTEGER) AS beats_control
    FROM features
    GROUP BY sae
) AS counted ON counted.sae = run.sae
ORDER BY run.sae;

COMMENT ON COLUMN runs.name IS 'name of the SAE in its training, and of its folder in data/sae, data/evaluation and data/labels';
COMMENT ON COLUMN runs.created_at IS 'when its catalogue was built, UTC';
COMMENT ON COLUMN runs.model IS 'the model that is explained';
COMMENT ON COLUMN runs.hookpoint IS 'where the activations were captured';
COMMENT ON COLUMN runs.target IS 'hookpoint whose activations it decodes, a transcoder; null: the same that it encodes';
COMMENT ON COLUMN runs.variant IS 'how it was trained, such as batch_topk';
COMMENT ON COLUMN runs.k IS 'latents that were asked to fire a token; where the weight of a penalty was given, not what came';
COMMENT ON COLUMN runs.git_commit IS 'commit of the code that trained it; null: no git';
COMMENT ON COLUMN runs.git_dirty IS 'whether tracked files differed from that commit; null: no git';
COMMENT ON COLUMN runs.dvc_experiment IS 'DVC experiment; null: made in the checkout, or no DVC';
COMMENT ON COLUMN runs.dvc_lock IS 'checksum of dvc.lock; null: no DVC';
COMMENT ON COLUMN runs.mlflow_run_id IS 'MLflow run that holds its curves; null: no tracking server answered';
COMMENT ON COLUMN runs.prefect_flow_run_id IS 'Prefect flow run that made it; null: made without Prefect';
COMMENT ON COLUMN runs.images_digest IS 'sha256 of the manifest of the images';
COMMENT ON COLUMN runs.activations_digest IS 'sha256 of the manifest of the activations it was trained on';
COMMENT ON COLUMN runs.sae_digest IS 'sha256 of the manifest of the SAE';
COMMENT ON COLUMN runs.params IS 'the params of each stage that led here, by section';
COMMENT ON COLUMN runs.n_latents IS 'latents of the SAE';
COMMENT ON COLUMN runs.n_labelled IS 'latents with a label';
COMMENT ON COLUMN runs.label_score IS 'mean label score of the features that have one; null: none has';
COMMENT ON COLUMN runs.control_score IS 'mean score of another latent''s name on the same images: what label_score is to be compared with; null: none has';
COMMENT ON COLUMN runs.beats_control IS 'share of the features with a label whose name scores higher than another latent''s name; null: none has';
COMMENT ON COLUMN runs.decision IS 'champion or challenger, by the retrain flow; null: it was not asked, or another of its training was better';
COMMENT ON COLUMN runs.decided_at IS 'when that was decided, UTC; null: it was not';
COMMENT ON COLUMN runs.reason IS 'the numbers behind the decision; null: none was made';
