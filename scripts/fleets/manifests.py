"""The Kubernetes manifests against the schemas of their kinds."""
import sys

from fleets.parts import DEPLOY, TOOLS


def check(report, crds):
    sys.path.insert(0, str(TOOLS))
    try:
        import jsonschema, kubernetes_validate, yaml
    except ImportError as error:
        sys.exit(f"fleet: error: {error}: scripts/setup fleet")
    custom = dict(definitions(yaml, crds)) if crds else {}
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            what = f"{path.name}: {document['kind']} {document['metadata']['name']}"
            try:
                kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
                report.line(what, True)
            except kubernetes_validate.ValidationError as error:
                report.line(what, False, why=error.message)
            except kubernetes_validate.SchemaNotFoundError:
                schema = custom.get((document["apiVersion"], document["kind"]))
                if schema is None:
                    print(f"{'-':7} {what}: no schema at hand (--crds FOLDER)", flush=True)
                    continue
                errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
                report.line(what, not errors, **({"why": errors[0]} if errors else {}))


def definitions(yaml, folder):
    """The schemas of custom resources, by version and kind."""
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document and document.get("kind") == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    schema = version["schema"]["openAPIV3Schema"]
                    yield (f"{spec['group']}/{version['name']}", spec["names"]["kind"]), closed(schema)


def closed(schema):
    """A schema that knows no other fields than its own, as strict validation has it."""
    if isinstance(schema, dict):
        schema = {name: closed(part) for name, part in schema.items()}
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        schema = [closed(part) for part in schema]
    return schema
