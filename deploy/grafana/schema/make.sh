#!/usr/bin/env bash
# Makes dashboard.schema.json.gz from the types of @grafana/schema: the SDK that writes the dashboards checks nothing.
# Wants node and npm; works in a temporary folder. The tests read only what it wrote.
set -euo pipefail

GRAFANA_SCHEMA=11.6.16
TYPESCRIPT=5.9.3
GENERATOR=2.9.0

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
echo '{"private": true, "type": "module"}' > package.json
npm install --silent --no-audit --no-fund --ignore-scripts \
    "@grafana/schema@$GRAFANA_SCHEMA" "typescript@$TYPESCRIPT" "ts-json-schema-generator@$GENERATOR"

# A panel's options and field settings are only records to the dashboard's own type: each kind has types of its own, of
# which several share their names, hence one schema for each.
raw=@grafana/schema/dist/esm/raw
schema() { # NAME FIELDS: reads imports from stdin
    { cat; echo "export interface Checked { $2 }"; } > "$1.ts"
    npx ts-json-schema-generator --path "$1.ts" --type Checked --no-type-check --out "$1.json"
}
schema dashboard "dashboard: Dashboard" <<< "import type { Dashboard } from '$raw/dashboard/x/dashboard_types.gen';"
for kind in Heatmap Stat Table TimeSeries; do
    fields="options: Of.Options"
    [ $kind = Stat ] || fields+="; custom: Of.FieldConfig"
    schema "${kind,,}" "$fields" <<< "import type * as Of from '$raw/composable/${kind,,}/panelcfg/x/${kind}PanelCfg_types.gen';"
done

node --input-type=module > schema.json <<'JS'
import { readFileSync } from "node:fs";
const names = ["dashboard", "heatmap", "stat", "table", "timeseries"];
const read = (name) => JSON.parse(readFileSync(`${name}.json`, "utf8"));
console.log(JSON.stringify(Object.fromEntries(names.map((name) => [name, read(name)]))));
JS
gzip --best --no-name --stdout schema.json > "$here/dashboard.schema.json.gz"
ls -l "$here/dashboard.schema.json.gz"
