-- images(image): an image of the data set; its encoded bytes stay in the artefact, the thumbnail is here.
-- $resize is [shorter side] or [height, width] and $crop [height, width], as the model's preprocessing has them; both may be null.
CREATE TABLE images AS
WITH found AS (
    SELECT
        * EXCLUDE (encoded),
        $crop::DOUBLE[] AS crop,
        CASE len($resize::DOUBLE[])
            WHEN 2 THEN $resize::DOUBLE[]
            WHEN 1 THEN [x * ($resize::DOUBLE[])[1] / least(width, height) FOR x IN [height, width]]
        END AS resized
    FROM read_parquet($images)
)
SELECT
    * EXCLUDE (crop, resized),
    if(resized IS NULL, NULL, least(1, crop[2] / resized[2]))::FLOAT AS seen_width,
    if(resized IS NULL, NULL, least(1, crop[1] / resized[1]))::FLOAT AS seen_height
FROM found
ORDER BY image;

COMMENT ON COLUMN images.seen_width IS 'share of the width, about the centre, that the model sees: where heat maps lie; null: not known';
COMMENT ON COLUMN images.seen_height IS 'share of the height, about the centre, that the model sees; null: not known';
