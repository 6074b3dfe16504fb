// SPDX-License-Identifier: Apache-2.0
// The page at /docs: Swagger UI upon this server's own OpenAPI document. A token given to it is forgotten with the page.

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null, // else a document that is not local would be sent to one
});
