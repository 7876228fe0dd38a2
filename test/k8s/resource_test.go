package k8s

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// resource is a kind of object that carries one text, so that the same test
// runs over kinds that reach the store on different ways.
type resource struct {
	schema.GroupVersionResource
	kind   string
	cached bool     // has a watch cache in the API server
	field  []string // where the text lies
	base64 bool     // the text is encoded there
}

var (
	configMaps = resource{
		GroupVersionResource: schema.GroupVersionResource{Version: "v1", Resource: "configmaps"},
		kind:                 "ConfigMap",
		field:                []string{"data", "text"},
	}
	secrets = resource{
		GroupVersionResource: schema.GroupVersionResource{Version: "v1", Resource: "secrets"},
		kind:                 "Secret",
		cached:               true,
		field:                []string{"data", "text"},
		base64:               true,
	}
	widgets = resource{
		GroupVersionResource: schema.GroupVersionResource{Group: "test.quire.example", Version: "v1", Resource: "widgets"},
		kind:                 "Widget",
		cached:               true,
		field:                []string{"spec", "text"},
	}
	resources = []resource{configMaps, secrets, widgets}
)

func (r resource) in(cp *controlPlane, namespace string) dynamic.ResourceInterface {
	return cp.dynamic.Resource(r.GroupVersionResource).Namespace(namespace)
}

func (r resource) object(name, text string) *unstructured.Unstructured {
	object := &unstructured.Unstructured{Object: map[string]any{}}
	object.SetGroupVersionKind(r.GroupVersion().WithKind(r.kind))
	object.SetName(name)
	r.setText(object, text)
	return object
}

func (r resource) setText(object *unstructured.Unstructured, text string) {
	if r.base64 {
		text = base64.StdEncoding.EncodeToString([]byte(text))
	}
	if err := unstructured.SetNestedField(object.Object, text, r.field...); err != nil {
		panic(err) // the objects are all made by object
	}
}

// update gives an object another text, whatever it carried before.
func (r resource) update(ctx context.Context, client dynamic.ResourceInterface, name, text string) (*unstructured.Unstructured, error) {
	patch := &unstructured.Unstructured{Object: map[string]any{}}
	r.setText(patch, text)
	body, err := json.Marshal(patch.Object)
	if err != nil {
		return nil, err
	}
	return client.Patch(ctx, name, types.MergePatchType, body, metav1.PatchOptions{})
}

// text returns what the object carries; "" when there is nothing.
func (r resource) text(object *unstructured.Unstructured) string {
	text, _, err := unstructured.NestedString(object.Object, r.field...)
	if err != nil {
		return "not a text: " + err.Error()
	}
	if r.base64 {
		decoded, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return "not base64: " + err.Error()
		}
		return string(decoded)
	}
	return text
}

// newNamespace makes a namespace with a name derived from the test's.
func (cp *controlPlane) newNamespace(t *testing.T) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	if _, err := cp.typed.CoreV1().Namespaces().Create(t.Context(), namespaceObject(name), metav1.CreateOptions{}); err != nil {
		t.Fatalf("creating namespace %s: %v", name, err)
	}
	return name
}

func namespaceObject(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// definition returns the definition of a namespaced custom resource
// PLURAL.test.quire.example with spec.text, spec.size (default 1) and a status
// subresource.
func definition(plural, kind string) *apiextensionsv1.CustomResourceDefinition {
	text := apiextensionsv1.JSONSchemaProps{Type: "string"}
	size := apiextensionsv1.JSONSchemaProps{Type: "integer", Default: &apiextensionsv1.JSON{Raw: []byte("1")}}
	return &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: plural + "." + widgets.Group},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: widgets.Group,
			Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{
				Plural: plural, Singular: strings.ToLower(kind), Kind: kind, ListKind: kind + "List",
			},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
				Name: widgets.Version, Served: true, Storage: true,
				Subresources: &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{}},
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
					Type: "object",
					Properties: map[string]apiextensionsv1.JSONSchemaProps{
						"spec": {Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{
							"text": text, "size": size,
						}},
						"status": {Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{
							"phase": text,
						}},
					},
				}},
			}},
		},
	}
}

// define creates a custom resource definition and waits until the API server
// serves the resource.
func (cp *controlPlane) define(t *testing.T, definition *apiextensionsv1.CustomResourceDefinition) {
	t.Helper()
	client := cp.extensions.ApiextensionsV1().CustomResourceDefinitions()
	if _, err := client.Create(t.Context(), definition, metav1.CreateOptions{}); err != nil {
		t.Fatalf("creating the definition %s: %v", definition.Name, err)
	}
	eventually(t, time.Minute, func() (bool, string) {
		return cp.serves(t.Context(), definition)
	})
}

func (cp *controlPlane) serves(ctx context.Context, definition *apiextensionsv1.CustomResourceDefinition) (bool, string) {
	got, err := cp.extensions.ApiextensionsV1().CustomResourceDefinitions().Get(ctx, definition.Name, metav1.GetOptions{})
	if err != nil {
		return false, err.Error()
	}
	established := false
	for _, condition := range got.Status.Conditions {
		if condition.Type == apiextensionsv1.Established && condition.Status == apiextensionsv1.ConditionTrue {
			established = true
		}
	}
	if !established {
		return false, definition.Name + " is not established"
	}
	served := schema.GroupVersionResource{
		Group: definition.Spec.Group, Version: definition.Spec.Versions[0].Name, Resource: definition.Spec.Names.Plural,
	}
	if _, err := cp.dynamic.Resource(served).List(ctx, metav1.ListOptions{Limit: 1}); err != nil {
		return false, err.Error()
	}
	return true, ""
}
